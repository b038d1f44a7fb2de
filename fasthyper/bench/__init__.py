"""How fast it is on this machine: workloads, the peers it is measured beside, counted work, predictions, tables."""
