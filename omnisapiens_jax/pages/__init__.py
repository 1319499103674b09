"""What the HTML pages share: their style, charts, and media that lie inside the file."""
