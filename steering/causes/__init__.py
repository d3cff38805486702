"""What an expert causes: effects of taking it out, on a number that each prompt has."""
