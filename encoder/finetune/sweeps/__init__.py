"""Many fine-tunings: settings times seeds, one after another in few processes, and a table of them."""
