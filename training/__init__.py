"""The making of the bundled model: data, training, export and the figures of its card."""
