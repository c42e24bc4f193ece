"""The process and its surroundings: signals, several processes, heartbeat, memory, terminal."""
