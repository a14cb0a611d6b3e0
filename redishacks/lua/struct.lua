-- What the other scripts use of `struct`, for servers that lack it (fakeredis); included by them.
-- Formats: B, I1 to I7, and i1 to i8, which have a sign; little-endian, or after a ">" the highest
-- byte first. Numbers are exact below 2^53 of either sign.

local struct = struct or (function()
  local function fields(format)
    local found = {}
    for letter, size in string.gmatch(format, '([BIi])(%d*)') do
      found[#found + 1] = {letter == 'B' and 1 or tonumber(size), letter == 'i'}
    end
    return found, string.sub(format, 1, 1) == '>'
  end

  local function pack(format, ...)
    local values, parts = {...}, {}
    local found, big = fields(format)
    for i, field in ipairs(found) do
      local value, bytes = values[i], {}
      for place = 1, field[1] do
        bytes[place] = string.char(value % 256)
        value = math.floor(value / 256)
      end
      local part = table.concat(bytes)
      parts[i] = big and string.reverse(part) or part
    end
    return table.concat(parts)
  end

  local function unpack_(format, text, at)
    local values = {}
    local found, big = fields(format)
    at = at or 1
    for i, field in ipairs(found) do
      local size, value = field[1], 0
      for place = 0, size - 1 do
        local byte = string.byte(text, big and at + place or at + size - 1 - place)
        if place == 0 and field[2] and byte >= 128 then
          byte = byte - 256 -- the highest one has the sign; so no step passes what is exact
        end
        value = value * 256 + byte
      end
      values[i] = value
      at = at + size
    end
    values[#values + 1] = at
    return unpack(values)
  end

  return {pack = pack, unpack = unpack_}
end)()
