"""How the embedded text and model were made, and how their numbers are measured again."""
