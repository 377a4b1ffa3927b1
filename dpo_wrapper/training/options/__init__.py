"""Options of training, in the groups in which the command line shows them."""
