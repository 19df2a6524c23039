"""The tour: its snippets import docs.tour.lab, its figures docs.figures.style."""
