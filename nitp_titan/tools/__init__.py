"""What a user asks before a run or after it."""
