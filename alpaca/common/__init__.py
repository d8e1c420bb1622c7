"""What every room needs: command lines, files that are whole or absent, records and journals."""
