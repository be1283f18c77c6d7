"""Methods compared over strengths and seeds, at equal accuracy."""
