"""What any part may use: errors, files, timers, hardware, formatting. Imports nothing of dscl."""
