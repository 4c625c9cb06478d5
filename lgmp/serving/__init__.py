"""`lgmp serve`: devices for the guests of other virtual machine monitors."""
