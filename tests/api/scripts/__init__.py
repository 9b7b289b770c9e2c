"""Scripts as users write them: `train` in the engine's words, `bare` the same in torch's alone, on one process."""
