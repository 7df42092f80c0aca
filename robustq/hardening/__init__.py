"""Training methods: the one trainer loop, and one file per method beside it."""
