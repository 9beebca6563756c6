"""How much a GPU holds, and how many replicas a load needs: arithmetic and simulation, no GPU."""
