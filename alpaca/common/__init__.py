"""What every room needs: command lines, files that are whole or not there, records and journals."""
