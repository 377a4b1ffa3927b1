"""A record of any form -> `Example`."""
