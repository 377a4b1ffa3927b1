"""`dpo-wrapper prepare --out`: rows -> a folder that training maps into memory."""
