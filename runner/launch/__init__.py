"""Starting the processes of a run. The only room, with distributed, that reads the environment."""
