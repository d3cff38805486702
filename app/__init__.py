"""The doors into moescope for people: the command line and the dashboard."""
