"""Pictures as text: SVG and what a terminal shows.  Numbers and labels come in, strings go out; knows no adapters."""
