"""Analysis of SAEs: prompts, interventions, attribution, matching, geometry, absorption, figures."""
