"""One adapter in another layout: what the layout can carry, exact rewritings, and the proof that nothing changed."""
