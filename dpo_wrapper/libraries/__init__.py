"""What other libraries leave open: their errors as sentences, the hub without a network, modes of files."""
