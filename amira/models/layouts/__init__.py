"""Layouts in which transducers are published, one module each: each recognises its graphs and converts them."""
