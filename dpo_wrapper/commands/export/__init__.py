"""`dpo-wrapper export`: a trained model in the forms in which others use it, each read back and compared."""
