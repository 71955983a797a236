"""Questions about SAEs: what fires in a prompt, what latents cause and contribute, how two SAEs compare."""
