"""`llama4 checkpoint ACTION`: what a run has kept. Each action is a module like a command's (`launch/cli.py`)."""

ACTIONS = {
    "list": ("launch.checkpoint_list", "show a run's checkpoints, those that were set aside included"),
    "verify": ("launch.checkpoint_verify", "compare checkpoints' files with what was written"),
    "seal": ("launch.checkpoint_seal", "take a checkpoint without a manifest at its word, and write one"),
    "diff": ("launch.checkpoint_diff", "show how two checkpoints differ: configuration, place in the data, arrays"),
}
