"""What people read: tables of plans, of proofs and of runs. Decides how a figure is written, not what it is."""
