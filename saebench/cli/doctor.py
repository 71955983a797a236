"""The output of `saebench doctor`. It imports only saebench, so that it works if packages are broken."""

from __future__ import annotations

from saebench.cli.output import Result, table

TITLES = {
    "packages": "required packages",
    "devices": "devices",
    "optional": "optional parts",
    "plugins": "added by other packages",
    "system": "this machine",
    "data": "bundled and fetched data",
}
MARKS = {"ok": "ok", "missing": "-", "broken": "BROKEN"}


def doctor() -> Result:
    """Show what is installed, what works on this machine, and how to get what is missing."""
    from saebench.doctor import diagnose

    diagnosis = diagnose()
    parts = []
    for section, findings in diagnosis.sections().items():
        if findings:
            rows = [
                (MARKS[one.state], one.name, one.found or "", one.detail or "", one.fix or "")
                for one in findings
            ]
            parts.append(table(("", TITLES[section], "found", "", "to get or repair it"), rows))
    return Result(diagnosis.as_json(), "\n\n".join(parts), error_message=diagnosis.problem)
