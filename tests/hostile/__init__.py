"""What users really pass: one row per use, and whether it works, warns or is refused with a fix."""
