"""What every room needs: command lines, atomic files, records and journals."""
