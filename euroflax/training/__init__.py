"""The training step and the loop around it, with the record that it leaves."""
