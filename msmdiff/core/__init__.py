"""The toolkit proper: everything but the command line."""
