"""The commands that are built of training and evaluation, each in a folder of its own."""
