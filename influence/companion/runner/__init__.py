"""The command line, papermill, the check of the environment, the site."""
