"""Text in the 24 official languages of the European Union, written for Euroflax and given to the public domain."""
