"""Two models compared by people: pages on which they choose, and the score of their answers."""
