"""What a person and other programs see of a run: lines, bars, logged values, samples."""
