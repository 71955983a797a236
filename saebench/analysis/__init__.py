"""Questions about an SAE: what fires in a prompt (prompts.py), what latents cause (interventions.py)."""
