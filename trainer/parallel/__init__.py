"""How a run is spread over processes: the grid, and the collectives that training needs."""
