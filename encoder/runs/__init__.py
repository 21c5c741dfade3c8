"""What a run is: its settings, phases, folder and ledger; nothing here trains."""
