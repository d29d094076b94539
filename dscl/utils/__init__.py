"""Helpers that every other package may use: errors, files, timers, hardware, text. Imports no other part of dscl."""
