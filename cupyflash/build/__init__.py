"""From a plan to something that can be launched."""
