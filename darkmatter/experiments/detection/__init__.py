"""Are latents interpretable: windows of text, the detection task, its scorers."""
