"""The book: records, figures, notebooks, pages and the runner."""
