-- What the other scripts use of `struct`, for servers that lack it (fakeredis); included by them.
-- Formats are little-endian: B, and I1 to I7.

local struct = struct or (function()
  local function sizes(format)
    local found = {}
    for letter, size in string.gmatch(format, '([BI])(%d*)') do
      found[#found + 1] = letter == 'B' and 1 or tonumber(size)
    end
    return found
  end

  local function pack(format, ...)
    local values, bytes = {...}, {}
    for i, size in ipairs(sizes(format)) do
      local value = values[i]
      for _ = 1, size do
        bytes[#bytes + 1] = string.char(value % 256)
        value = math.floor(value / 256)
      end
    end
    return table.concat(bytes)
  end

  local function unpack_(format, text, at)
    local found = {}
    at = at or 1
    for i, size in ipairs(sizes(format)) do
      found[i] = 0
      for place = at + size - 1, at, -1 do
        found[i] = found[i] * 256 + string.byte(text, place)
      end
      at = at + size
    end
    found[#found + 1] = at
    return unpack(found)
  end

  return {pack = pack, unpack = unpack_}
end)()

