"""The waist: an adapter as a value, from a folder and back to one, with every key accounted for."""
