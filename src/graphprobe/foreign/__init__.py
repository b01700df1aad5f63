"""What other tools write: readers without torch, one file a tool."""
