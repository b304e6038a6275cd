"""What ``python -m cupyflash`` shows: values first, then the text made of them.  Nothing imports this folder."""
