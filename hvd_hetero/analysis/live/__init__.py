"""A look inside runs that go on: how they stand, what is asked of them, a page, figures for Prometheus."""
