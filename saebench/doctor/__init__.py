"""``saebench doctor``: what is installed, what works on this machine, and how to get what is missing."""

from saebench.doctor.diagnosis import Diagnosis, Finding, diagnose

__all__ = ["Diagnosis", "Finding", "diagnose"]
