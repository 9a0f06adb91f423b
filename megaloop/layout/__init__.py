"""How a plan lies on ranks: topology, partition, rounds, pieces and what moves between two placements. No engine."""
